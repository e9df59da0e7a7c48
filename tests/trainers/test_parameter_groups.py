"""The optimiser's groups: rates of towers and heads, and what is not decayed."""

from conftest import make_student
from tiny_trainer import make_trainer

from trainers.parameter_groups import parameter_groups


def test_towers_and_heads_have_their_own_rates_and_norms_no_decay(tmp_path, rows):
    args = make_trainer(tmp_path, rows, learning_rate=1e-3, head_learning_rate=1e-2, weight_decay=0.1).args
    model, _ = make_student()
    model.text_model.embeddings.word_embeddings.weight.requires_grad_(False)
    names = {parameter: name for name, parameter in model.named_parameters()}
    for unused in (set(), {"text_model.embeddings.word_embeddings.weight"}):
        seen = []
        for group in parameter_groups(model, args, unused):
            for parameter in group["params"]:
                name = names[parameter]
                seen.append(name)
                assert group["lr"] == (1e-3 if "_model." in name else 1e-2), name
                assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0), name
        assert sorted(seen) == sorted(
            set(names.values()) - ({"text_model.embeddings.word_embeddings.weight"} - unused)
        )
