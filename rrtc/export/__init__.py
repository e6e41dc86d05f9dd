"""`rrtc export`: the format in which a model leaves. stage.py holds the order of the work; formats/ has a file for each
format; quantize.py puts matrices in 8 or 4 bits; verify.py is the check in a fresh process, by the programs of fresh/;
card.py is what the export says about itself; push.py uploads it."""
