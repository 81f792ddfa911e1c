"""Our heads inside other packages. Each file needs the package that it is named after."""
