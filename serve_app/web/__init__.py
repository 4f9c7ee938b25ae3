"""HTTP, without Ray.

gate is who may ask, how much and by when, and the shape of errors; security checks keys; body unpacks and bounds what
is sent; service is all that routes need of the scorer behind them; api has rayward's own routes; dialects those of
other servers; playground the page at /, reference the one at /docs; proxy is what Serve's own proxies do where the
process with the routes is lost.
"""
