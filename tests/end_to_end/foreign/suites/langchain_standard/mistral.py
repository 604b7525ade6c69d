"""langchain's standard tests of a chat model: langchain-mistralai, which has no `stream_options`."""

import os

from langchain_mistralai import ChatMistralAI
from langchain_tests.integration_tests import ChatModelIntegrationTests

END_STRINGS = {"6": 8, "2029": 8}  # quotation marks: a string of its own would go on for ever


class TestMistral(ChatModelIntegrationTests):
    @property
    def chat_model_class(self):
        return ChatMistralAI

    @property
    def chat_model_params(self):
        return {
            "model": "manta-demo",
            "base_url": os.environ["OPENAI_BASE_URL"],
            "temperature": 0,
            "max_tokens": 150,
            "max_retries": 0,
            "model_kwargs": {"logit_bias": END_STRINGS, "parallel_tool_calls": False},
        }

    @property
    def supports_json_mode(self):
        return True

    @property
    def model_override_value(self):
        return "manta-demo"
