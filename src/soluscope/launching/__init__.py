"""A sweep file to jobs, and the jobs' states; the engines run them."""
