"""Kubernetes manifests of one Manta config, and what is wrong with manifests. Asks no cluster."""
