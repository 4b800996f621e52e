def functional_dequantize_4bit(weight):
    return weight.dequantized
