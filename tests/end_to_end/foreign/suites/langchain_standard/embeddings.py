"""langchain's standard tests of embeddings, with both of its clients."""

import os

from langchain_mistralai import MistralAIEmbeddings
from langchain_openai import OpenAIEmbeddings
from langchain_tests.integration_tests import EmbeddingsIntegrationTests


class TestOpenAI(EmbeddingsIntegrationTests):
    @property
    def embeddings_class(self):
        return OpenAIEmbeddings

    @property
    def embedding_model_params(self):
        # Without this it sends the token ids of OpenAI's own models.
        return {"model": "mistral-embed", "check_embedding_ctx_length": False, "max_retries": 0}

    def test_a_thousand_documents(self, model):
        embeddings = model.embed_documents([f"document {number}" for number in range(1000)])
        assert len(embeddings) == 1000


class TestMistral(EmbeddingsIntegrationTests):
    @property
    def embeddings_class(self):
        return MistralAIEmbeddings

    @property
    def embedding_model_params(self):
        return {"model": "mistral-embed", "endpoint": f"{os.environ['OPENAI_BASE_URL']}/", "max_retries": 1}
