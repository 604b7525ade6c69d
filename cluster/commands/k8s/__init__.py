"""`manta k8s`: manifests, secrets and the drain of a pod, as commands.

Rules and manifests are `cluster.kubernetes`'s.
"""
