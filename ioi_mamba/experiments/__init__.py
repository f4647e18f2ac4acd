"""What an experiment is: the record, its options, and what it is given when it runs."""
