"""Run by datasets_scripts/test_feature_job: the teacher's features, killed before the n-th change of a file's name."""

import os
import shutil
import signal
import sys

from datasets_scripts import add_teacher_features


def count_changes(moment: int) -> list[int]:
    """From now on the process kills itself before its n-th change of a file's name or removal of a folder."""
    made = [0]

    def deadly(call):
        def wrapper(*arguments, **settings):
            made[0] += 1
            if made[0] == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **settings)

        return wrapper

    os.replace, os.rename, os.link, shutil.rmtree = map(deadly, (os.replace, os.rename, os.link, shutil.rmtree))
    return made


if __name__ == "__main__":
    count_changes(int(sys.argv[1]))
    add_teacher_features.main(sys.argv[2:])
