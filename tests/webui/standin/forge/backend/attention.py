def attention_pytorch(q, k, v, heads, mask=None):
    raise AssertionError("the stand-in's model has attention of its own")


def attention_function(q, k, v, heads, mask=None):
    raise AssertionError("has no backward pass")
