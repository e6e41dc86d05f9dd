"""`rrtc init`: from a dense model to a tied one. tie.py holds the mathematics, stage.py the order of the work."""
