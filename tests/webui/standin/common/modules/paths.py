models_path = ""  # the tests say
