"""`rrtc eval`: measures a compressed model beside its dense original, on the same tokens in the same run."""
