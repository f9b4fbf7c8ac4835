"""What `distkit doctor` looks at: a check is a function, and `table` lists them."""
