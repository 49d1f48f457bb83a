"""`gencontrol bench ctrl`: claims, worlds, peers and the computable optimum of CTRL."""
