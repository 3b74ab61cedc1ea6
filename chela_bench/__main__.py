from chela_bench.cli import main

main()
