"""python -m bigjax: what concerns no single experiment."""

if __name__ == "__main__":
    from bigjax.tools.commands import main

    main()
