"""Many prompts: tasks on one or more machines answer a file of prompts, in a folder that a later run can continue."""
