-- Finish the runs of a batch: results, failures and retries in one step. What it leaves is what RQ's own methods leave
-- (worker.handle_job_success, handle_job_failure and job.retry), for jobs without dependents.
--
-- KEYS  1 rq:wip zset, 2 rq:finished zset, 3 rq:failed zset, 4 queue list, 5 the worker's hash, 6 its set of executions,
--       7 the model's counters
-- ARGV  1 RQ's key prefix, 2 seconds to keep the counters, 3 worker name, 4 time now in whole seconds, 5 whether a job
--       with dependents is left alone, 6 how many runs; then for each run:
--       job id, execution id, 'finished' | 'failed' | 'retry' | 'retry_front', status, when it started and ended as RQ
--       writes it, seconds it took, seconds to keep it (-1: for ever), whether it depended on others, and three lists,
--       each after its length: further hash fields and values, those of the result entry, counters to raise by one
-- Returns for each run: 1 done; 0 given up meanwhile, by a recovery, a cancel or a deletion, so nothing was written;
--       2 it has dependents: nothing was written, RQ's own method must finish it; 3 it could not be written whole.
local prefix, worker, now, at = ARGV[1], ARGV[3], tonumber(ARGV[4]), 6
local counts = {}

-- Before the first write: what raises for one run must be that run's own doing.
local kinds = {'zset', 'zset', 'zset', 'list', 'hash', 'set', 'hash'}
for n, key in ipairs(KEYS) do
  local found = redis.call('TYPE', key)['ok']
  if found ~= 'none' and found ~= kinds[n] then
    return redis.error_reply('WRONGTYPE ' .. key .. ' holds a ' .. found .. ', not a ' .. kinds[n] .. '; delete it')
  end
end

local function take()
  at = at + 1
  return ARGV[at]
end

local function take_list()
  local list = {}
  for n = 1, tonumber(take()) do
    list[n] = take()
  end
  return list
end

local function take_run()
  local run = {id = take(), execution = take(), kind = take(), status = take(), started = take(), ended = take()}
  run.seconds, run.ttl, run.depends = take(), tonumber(take()), take()
  run.fields, run.entry, run.counters = take_list(), take_list(), take_list()
  run.composite = run.id .. ':' .. run.execution
  run.job = prefix .. ':job:' .. run.id
  run.retry = run.kind == 'retry' or run.kind == 'retry_front'
  return run
end

-- What goes into the shared keys is written once, at the end.
local ended, records, finished = {}, {}, {}
local numbers, seconds = {successful_job_count = 0, failed_job_count = 0}, 0

local function close(run)
  ended[#ended + 1] = run.composite
  records[#records + 1] = prefix .. ':execution:' .. run.composite
  redis.pcall('ZREM', prefix .. ':executions:' .. run.id, run.execution)
end

local function count(run)
  local number = run.kind == 'finished' and 'successful_job_count' or 'failed_job_count'
  numbers[number] = numbers[number] + 1
  seconds = seconds + tonumber(run.seconds)
  for _, name in ipairs(run.counters) do
    counts[name] = (counts[name] or 0) + 1
  end
end

local function write(run)
  redis.call('HSET', run.job, 'status', run.status, 'started_at', run.started, 'ended_at', run.ended,
    'last_heartbeat', run.ended, 'worker_name', worker, unpack(run.fields))
  if run.retry then
    redis.call(run.kind == 'retry' and 'RPUSH' or 'LPUSH', KEYS[4], run.id)
    return
  end
  local results = prefix .. ':results:' .. run.id
  if type(redis.pcall('XADD', results, 'MAXLEN', 10, '*', unpack(run.entry))) == 'table' then
    redis.call('DEL', results)
    redis.call('XADD', results, 'MAXLEN', 10, '*', unpack(run.entry))
  end
  if run.ttl == -1 then
    redis.call('PERSIST', results)
  else
    redis.call('EXPIRE', results, run.ttl)
    redis.call('EXPIRE', run.job, run.ttl)
    if run.depends == '1' then
      -- RQ's own spelling, with two colons.
      redis.call('EXPIRE', prefix .. ':job::' .. run.id .. ':dependencies', run.ttl)
    end
  end
  if run.kind == 'finished' then
    finished[#finished + 1] = run.ttl == -1 and '+inf' or now + run.ttl
    finished[#finished + 1] = run.id
  else
    -- Each registry marks "for ever" in its own way.
    redis.call('ZADD', KEYS[3], run.ttl == -1 and -1 or now + run.ttl, run.id)
  end
end

local done = {}
for n = 1, tonumber(ARGV[6]) do
  local run = take_run()
  if ARGV[5] == '1' and not run.retry and redis.call('EXISTS', run.job .. ':dependents') == 1 then
    done[n] = 2
  -- The fence: whoever removes this member owns the run's end.
  elseif redis.call('ZREM', KEYS[1], run.composite) == 0 then
    close(run)
    done[n] = 0
  else
    close(run)
    count(run)
    if redis.call('TYPE', run.job)['ok'] ~= 'hash' then
      -- Deleted while it ran: there is nothing left to finish.
      done[n] = 0
    else
      -- Scripts don't roll back: one run that can't be written must not take the others' results with it.
      done[n] = pcall(write, run) and 1 or 3
    end
  end
end
if #ended > 0 then
  redis.call('SREM', KEYS[6], unpack(ended))
  redis.call('DEL', unpack(records))
end
if #finished > 0 then
  redis.call('ZADD', KEYS[2], unpack(finished))
end
for name, number in pairs(numbers) do
  if number > 0 then
    redis.pcall('HINCRBY', KEYS[5], name, number)
  end
end
redis.pcall('HINCRBYFLOAT', KEYS[5], 'total_working_time', seconds)
for name, number in pairs(counts) do
  redis.pcall('HINCRBY', KEYS[7], name, number)
end
redis.pcall('HINCRBY', KEYS[7], 'batches', 1)
redis.call('EXPIRE', KEYS[7], ARGV[2])
return done
