"""Ways to run the server on other machines: Ray Serve, a container image, Kubernetes. Not installed
with the package."""
