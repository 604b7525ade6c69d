"""langchain's standard tests of a chat model: langchain-openai through the Responses API."""

from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests


class TestResponses(ChatModelIntegrationTests):
    @property
    def chat_model_class(self):
        return ChatOpenAI

    @property
    def chat_model_params(self):
        return {
            "model": "manta-demo",
            "use_responses_api": True,
            "temperature": 0,
            "max_tokens": 150,
            "max_retries": 0,
            "model_kwargs": {"parallel_tool_calls": False},
        }

    @property
    def supports_json_mode(self):
        return True

    @property
    def supports_anthropic_inputs(self):
        return True  # langchain-openai turns them into OpenAI's

    @property
    def model_override_value(self):
        return "manta-demo"
