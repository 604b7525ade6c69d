"""Every rule over every document."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from cluster.kubernetes.check.documents import Document, pod_templates
from cluster.kubernetes.check.images import image_problems
from cluster.kubernetes.check.list_keys import list_key_problems
from cluster.kubernetes.check.operator_rules import operator_problems
from cluster.kubernetes.check.quantities import quantity_problems
from cluster.kubernetes.check.references import reference_problems
from cluster.kubernetes.check.serve_rules import serve_problems
from cluster.kubernetes.check.shapes import shape_problems, without_nulls


def problems(documents: Sequence[Document]) -> Iterator[str]:
    """One sentence for each."""
    for identity, count in Counter(map(str, documents)).items():
        if count > 1:
            yield f"{identity}: there are {count} of it"
    documents = [without_nulls(document) for document in documents]
    misshapen = {id(document): found for document in documents if (found := list(shape_problems(document)))}
    for document in documents:
        if id(document) in misshapen:
            yield from misshapen[id(document)]
            continue
        if not document.name:
            yield f"{document}: metadata.name: there is none"
        for rule in (operator_problems, serve_problems, quantity_problems, list_key_problems):
            yield from rule(document)
    if misshapen:
        return  # who refers to whom cannot be told
    templates = list(pod_templates(documents))
    yield from reference_problems(documents, templates)
    yield from image_problems(templates)
