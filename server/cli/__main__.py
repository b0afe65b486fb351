from fastblt.server.cli import main

main()
