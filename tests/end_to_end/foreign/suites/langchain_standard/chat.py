"""langchain's standard tests of a chat model: langchain-openai through chat completions."""

from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests

END_STRINGS = {"6": 8, "2029": 8}  # quotation marks: a string of its own would go on for ever


class TestChat(ChatModelIntegrationTests):
    @property
    def chat_model_class(self):
        return ChatOpenAI

    @property
    def chat_model_params(self):
        return {
            "model": "manta-demo",
            "temperature": 0,
            "max_tokens": 150,
            "max_retries": 0,
            "logit_bias": END_STRINGS,
            "model_kwargs": {"parallel_tool_calls": False},
        }

    @property
    def supports_json_mode(self):
        return True

    @property
    def supports_anthropic_inputs(self):
        return True  # langchain-openai turns them into OpenAI's

    @property
    def supports_model_override(self):
        return True

    @property
    def model_override_value(self):
        return "manta-demo"
