"""Claim (b) and the frontier's question on real images: Fashion-MNIST with a ResNet and a vision transformer."""
