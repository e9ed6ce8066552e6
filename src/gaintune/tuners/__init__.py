"""The methods this project adds to PEFT, each as a PEFT tuner of its own type."""
