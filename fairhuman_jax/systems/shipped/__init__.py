"""Systems that train the networks shipped with the package."""
