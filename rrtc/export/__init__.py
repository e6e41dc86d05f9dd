"""`rrtc export`: the form in which a model leaves. stage.py holds the order of the work; forms.py what is written,
onnx_form.py the form that is a graph; verify.py, reload.py and reload_onnx.py the check of it in a fresh process;
card.py and licence.py what it says about itself."""
