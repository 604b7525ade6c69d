"""What is wrong with manifests, in sentences that name the document and the field. Reads documents; asks no cluster."""
