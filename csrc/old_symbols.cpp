// Lets one build load wherever torch does. A linker binds a symbol of the C or C++ library to its
// newest version on the machine that builds, and a machine that lacks this version refuses to load
// the library: glibc 2.34 moved threads and the loader into libc under a new version, GCC 9 and 11
// added symbols to libstdc++. torch's own libraries ask for glibc 2.28 and GCC 8. The newer names
// that our code, torch's headers and the static CUDA runtime refer to are defined here, hidden, as
// jumps to the oldest version of the same function, or as the few lines that they are. Not by a
// static libstdc++: exceptions pass between our library and torch's, and share its copy.
#if defined(__linux__) && defined(__x86_64__)
#include <exception>
#include <new>
#include <sstream>

#if defined(__GLIBC__)

#define BK_JUMP(name, old, version)                                                          \
  __asm__(".symver bk_old_" #name ", " #old "@" version "\n.globl " #name "\n.hidden " #name \
          "\n.type " #name ", @function\n" #name ":\n\tendbr64\n\tjmp bk_old_" #name         \
          "@PLT\n"                                                                           \
          ".size " #name ", . - " #name)
#define BK_OLDEST(name) BK_JUMP(name, name, "GLIBC_2.2.5")

// libm. The newer ones differ in errno only.
BK_OLDEST(exp);
BK_OLDEST(log);
BK_OLDEST(pow);

// Since glibc 2.38 C++ gets those of C23, which also read binary numbers.
BK_JUMP(__isoc23_strtol, strtol, "GLIBC_2.2.5");
BK_JUMP(__isoc23_strtoll, strtoll, "GLIBC_2.2.5");
BK_JUMP(__isoc23_strtoul, strtoul, "GLIBC_2.2.5");
BK_JUMP(__isoc23_strtoull, strtoull, "GLIBC_2.2.5");

// Before 2.34 in libdl, libpthread and librt, which torch has loaded there. A jump leaves the
// return address of the caller, by which dlopen and dlsym know where they are called from.
BK_OLDEST(dlclose);
BK_OLDEST(dlerror);
BK_OLDEST(dlopen);
BK_OLDEST(dlsym);
BK_OLDEST(dlvsym);
BK_JUMP(dlmopen, dlmopen, "GLIBC_2.3.4");
BK_OLDEST(pthread_condattr_setpshared);
BK_OLDEST(pthread_create);
BK_OLDEST(pthread_detach);
BK_OLDEST(pthread_getspecific);
BK_OLDEST(pthread_join);
BK_OLDEST(pthread_key_create);
BK_OLDEST(pthread_key_delete);
BK_OLDEST(pthread_kill);
BK_OLDEST(pthread_mutex_trylock);
BK_OLDEST(pthread_mutexattr_destroy);
BK_OLDEST(pthread_mutexattr_init);
BK_OLDEST(pthread_mutexattr_setpshared);
BK_OLDEST(pthread_mutexattr_settype);
BK_OLDEST(pthread_once);
BK_OLDEST(pthread_rwlock_destroy);
BK_OLDEST(pthread_rwlock_init);
BK_OLDEST(pthread_rwlock_rdlock);
BK_OLDEST(pthread_rwlock_timedrdlock);
BK_OLDEST(pthread_rwlock_timedwrlock);
BK_OLDEST(pthread_rwlock_tryrdlock);
BK_OLDEST(pthread_rwlock_trywrlock);
BK_OLDEST(pthread_rwlock_unlock);
BK_OLDEST(pthread_rwlock_wrlock);
BK_OLDEST(pthread_rwlockattr_destroy);
BK_OLDEST(pthread_rwlockattr_init);
BK_OLDEST(pthread_rwlockattr_setpshared);
BK_OLDEST(pthread_setspecific);
BK_OLDEST(pthread_spin_destroy);
BK_OLDEST(pthread_spin_init);
BK_OLDEST(pthread_spin_lock);
BK_OLDEST(pthread_spin_trylock);
BK_OLDEST(pthread_spin_unlock);
BK_OLDEST(sem_destroy);
BK_OLDEST(sem_init);
BK_OLDEST(sem_post);
BK_OLDEST(sem_timedwait);
BK_OLDEST(sem_trywait);
BK_OLDEST(sem_wait);
BK_OLDEST(shm_open);
BK_OLDEST(shm_unlink);

#define BK_HIDDEN extern "C" __attribute__((visibility("hidden")))

// glibc 2.32: whether reference counts may do without atomics. Zero: not known.
BK_HIDDEN const char bk_single_threaded __asm__("__libc_single_threaded") = 0;

// GCC 13 refers to it from <iostream>: the streams are made by the libraries that use them.
BK_HIDDEN void bk_streams() __asm__("_ZSt21ios_base_library_initv");
void bk_streams() {}

// GCC 14, in place of std::terminate where an exception meets noexcept.
BK_HIDDEN void bk_terminate(void*) __asm__("__cxa_call_terminate");
void bk_terminate(void*) { std::terminate(); }

namespace std {
// GCC 9 made constructors out of what was inline before.
template basic_ostringstream<char>::basic_ostringstream();
template basic_stringstream<char>::basic_stringstream();
// GCC 11.
void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std

#endif
#endif
