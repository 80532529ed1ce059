//! Whole containers, where the machine that runs the tests lets them be made: root and cgroup v2.
