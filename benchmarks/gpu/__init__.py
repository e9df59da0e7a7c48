"""How fast training and making teacher features are on one GPU; runs offline, with random weights and images."""
