"""The subcommands of `dsyolo`, one module each."""
