from multiverse_hf.cli import main

main()
