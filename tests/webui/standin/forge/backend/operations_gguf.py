def dequantize_tensor(tensor):
    return tensor.dequantized
