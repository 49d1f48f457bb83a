"""`gencontrol bench gpc`: claims of policy composition, in closed form and on a robot."""
