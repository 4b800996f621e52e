from backend.attention import attention_function  # noqa: F401
