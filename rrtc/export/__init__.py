"""`rrtc export`: the form in which a model leaves. stage.py holds the order of the work; forms.py what is written,
writing.py how; onnx_form.py and gguf_form.py the forms that are one file for others; quantized_form.py and rounding.py
the matrices in 8 or 4 bits; verify.py the check in a fresh process: reload.py, reload_onnx.py or run_gguf.py;
card.py and card_loading.py what it says about itself; push.py, vllm_plugin.py and vllm_model.py where it goes."""
