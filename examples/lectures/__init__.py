"""Small scripts that compute and draw what lectures on latent-variable models show."""
