"""The system calls that a program in the sandbox may make, as a compiled seccomp filter.

Calls that computing needs are allowed. Calls that no solution needs kill the process: to start processes or programs,
open sockets, change files, or send signals to others. All other calls fail with EPERM.
"""

from __future__ import annotations

import errno
import os
import tempfile

_ALLOWED = """
    read readv pread64 preadv write writev close lseek dup dup2 dup3 fcntl mmap munmap mprotect mremap madvise
    brk rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait sigaltstack pause alarm setitimer
    getitimer futex set_robust_list get_robust_list set_tid_address rseq membarrier arch_prctl restart_syscall
    exit exit_group getpid getppid gettid getuid geteuid getgid getegid getresuid getresgid getpgrp getpgid
    getsid getgroups clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time times getrusage
    getrlimit sched_yield sched_getaffinity getcpu getrandom uname sysinfo umask stat fstat lstat newfstatat
    statx statfs fstatfs access faccessat faccessat2 readlink readlinkat getcwd chdir fchdir getdents getdents64
    poll ppoll select pselect6
"""

_KILLED = """
    fork vfork execve execveat kill ptrace process_vm_readv process_vm_writev socket socketpair connect bind
    io_uring_setup bpf userfaultfd memfd_create creat mkdir mkdirat mknod mknodat rename renameat renameat2
    unlink unlinkat rmdir link linkat symlink symlinkat chmod fchmod fchmodat fchmodat2 chown fchown lchown
    fchownat truncate ftruncate fallocate setxattr lsetxattr fsetxattr utime utimes utimensat futimesat mount
    umount2 pivot_root chroot unshare setns setuid setgid setreuid setregid setresuid setresgid setgroups
"""

#: Requests of `ioctl` that query files and terminals. Others could write to a terminal.
_IOCTLS = {"TCGETS": 0x5401, "TIOCGWINSZ": 0x5413, "FIONCLEX": 0x5450, "FIOCLEX": 0x5451}
_CLONE_THREAD = 0x00010000


class SeccompUnavailableError(RuntimeError):
    """This machine cannot filter system calls. The message says what is missing."""


def compile_filter() -> bytes:
    """The filter for this machine's architecture, in the kernel's format (struct sock_filter[]).

    Raises SeccompUnavailableError if the system is not Linux or has no libseccomp.
    """
    try:
        # The binding loads libseccomp when it is imported.
        import pyseccomp as seccomp
    except (ImportError, OSError, RuntimeError) as error:
        raise SeccompUnavailableError(
            f"no seccomp filter: {error}; install fastblt[eval], and the system's libseccomp (Debian: libseccomp2)"
        ) from error
    rules = seccomp.SyscallFilter(seccomp.ERRNO(errno.EPERM))

    def add(action: int, names: str, *arguments: seccomp.Arg) -> None:
        for name in names.split():
            try:
                number = seccomp.resolve_syscall(seccomp.system_arch(), name)
            except ValueError:
                # Not every architecture has every call, and an old library does not know the newest.
                continue
            if number >= 0:
                rules.add_rule(action, number, *arguments)

    def bits(argument: int, mask: int, value: int) -> seccomp.Arg:
        return seccomp.Arg(argument, seccomp.MASKED_EQ, mask, value)

    add(seccomp.ALLOW, _ALLOWED)
    add(seccomp.KILL_PROCESS, _KILLED)
    for number in _IOCTLS.values():
        add(seccomp.ALLOW, "ioctl", seccomp.Arg(1, seccomp.EQ, number))
    changes = (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC, os.O_APPEND)
    for name, flags in (("open", 1), ("openat", 2)):
        add(seccomp.ALLOW, name, bits(flags, sum(changes), 0))
        for flag in changes:
            add(seccomp.KILL_PROCESS, name, bits(flags, flag, flag))
    add(seccomp.ALLOW, "clone", bits(0, _CLONE_THREAD, _CLONE_THREAD))
    add(seccomp.KILL_PROCESS, "clone", bits(0, _CLONE_THREAD, 0))
    # The flags of these calls are in memory, which a filter cannot read. The C library falls back to the calls above.
    add(seccomp.ERRNO(errno.ENOSYS), "clone3 openat2")
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()
