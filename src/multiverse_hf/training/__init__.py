"""What the training recipes share. Needs the ``train`` extra."""
