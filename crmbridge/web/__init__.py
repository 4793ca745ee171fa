"""HTTP in: routes, authentication, limits and errors as JSON. Knows no Huey and makes no delivery."""
