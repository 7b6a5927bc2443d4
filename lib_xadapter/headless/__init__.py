"""X-Adapter on Hugging Face diffusers, without a WebUI: the only place that knows diffusers.

How a picture flows: `cli` reads the arguments, `model_files` loads, `prompts` encodes, `pipeline` makes the base's
picture, switches and runs the joint stage of the core, `grid` and `infotext` label and save.
"""
