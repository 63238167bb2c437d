"""Many prompts: a file of them answered by tasks on one machine or many, in a folder that can be gone on with."""
