"""Programs that the README's and the notes' figures come from."""
