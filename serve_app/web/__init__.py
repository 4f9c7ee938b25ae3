"""HTTP without Ray: who may ask and how (`gate`, `security`), what routes need of a scorer (`service`), rayward's own
routes (`api`), other servers' wire formats (`dialects`), the page at / (`playground`).
"""
