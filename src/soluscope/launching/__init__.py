"""From a sweep file to jobs and their states; the engines run the jobs."""
