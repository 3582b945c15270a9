// Threads that wait for work, or those of a framework.

#include "pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

namespace keras_ring {

namespace {

// What one thread is to do, and others at the same time.
struct Work {
  void (*function)(void*);
  void* data;
  std::mutex mutex{};
  std::exception_ptr thrown{};
  // With no exception, which would end the thread of somebody else.
  static void call(void* self) {
    Work& work = *static_cast<Work*>(self);
    try {
      work.function(work.data);
    } catch (...) {
      std::lock_guard<std::mutex> lock(work.mutex);
      work.thrown = std::current_exception();
    }
  }
};

// Threads that wait for work. They stay, with their scratch memory: to start
// one for each call takes as long as a small visit.
class Pool {
 public:
  // Do `work` here and in up to `helpers` threads at once, and return when all
  // of them have.
  void run(Index helpers, Work& work) {
    Job job{&work};
    {
      std::lock_guard<std::mutex> lock(mutex_);
      wanted_ += helpers;
      try {
        for (; count_ < wanted_; ++count_)
          std::thread([this] { serve(); }).detach();
      } catch (const std::system_error&) {
        // No more than there are: the caller works as well.
      }
      jobs_.insert(jobs_.end(), helpers, &job);
    }
    wake_.notify_all();
    Work::call(&work);
    std::unique_lock<std::mutex> lock(mutex_);
    jobs_.erase(std::remove(jobs_.begin(), jobs_.end(), &job), jobs_.end());
    done_.wait(lock, [&] { return job.running == 0; });
    wanted_ -= helpers;
  }

 private:
  struct Job {
    Work* work;
    int running = 0;
  };

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return !jobs_.empty(); });
      Job* job = jobs_.front();
      jobs_.pop_front();
      ++job->running;
      lock.unlock();
      Work::call(job->work);
      lock.lock();
      if (--job->running == 0) done_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::deque<Job*> jobs_;
  // Threads, and helpers of all calls at this moment.
  Index count_ = 0, wanted_ = 0;
};

// Never destroyed, since its threads end with the process. A process that was
// forked has none of them, and gets its own.
Pool*& pool() {
  static Pool* found = [] {
    pthread_atfork(nullptr, nullptr, [] { pool() = new Pool; });
    return new Pool;
  }();
  return found;
}

std::atomic<keras_ring_parallel> parallel{nullptr};

}  // namespace

void in_threads(Index threads, void (*function)(void*), void* data) {
  Work work{function, data};
  if (threads < 2)
    Work::call(&work);
  else if (const keras_ring_parallel call = parallel.load())
    call(&Work::call, &work, static_cast<unsigned>(threads), 0);
  else
    pool()->run(threads - 1, work);
  if (work.thrown) std::rethrow_exception(work.thrown);
}

}  // namespace keras_ring

extern "C" void keras_ring_use_threads(keras_ring_parallel call) {
  keras_ring::parallel = call;
}
