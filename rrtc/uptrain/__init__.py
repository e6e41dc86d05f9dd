"""`rrtc uptrain`: heals a tied model by distillation. stage.py holds the order of the work, trainer.py the loss."""
