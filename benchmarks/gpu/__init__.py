"""What training and feature-making reach on one GPU; runs offline, on random weights and pixels."""
