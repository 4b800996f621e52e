"""The stages that made the weights, in order: pictures, autoencoder, transformer. See ../README.md."""
