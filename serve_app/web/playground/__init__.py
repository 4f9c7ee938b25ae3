"""The playground: one page, served at `/`, that ranks answers with the models of the endpoint."""
