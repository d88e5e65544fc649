-- Take jobs from the front of a queue: each goes straight to `started`, with all four of its execution records, in one
-- step, so that a worker killed at any instant leaves it either queued or started and never in between.
--
-- KEYS  1 queue list, 2 rq:wip zset, 3 the worker's hash, 4 the worker's set of executions, 5 rq:suspended,
--       6 list of jobs that were handed from the queue's front to workers that waited
-- ARGV  1 how many at most, 2 RQ's key prefix, 3 worker name, 4 lease, 5 number of the first execution,
--       6 time now as RQ writes it, 7 time now in seconds, 8 seconds that the execution records live,
--       9 bytes of job data after which no more are taken, 10 whether a job taken alone may be suspected,
--       11 the run that the worker has in hand alone meanwhile, and of which that is not written down yet, or '',
--       12 whether the worker has other jobs in hand meanwhile
-- Returns a list of {job id, execution id, values of the fields read, and of a job that is not plain its whole hash}, or
-- of {job id, ''} where there was no such job, or a cancelled one; false when suspended.
local call, pcall, find = redis.call, redis.pcall, string.find
if call('EXISTS', KEYS[5]) == 1 then
  while type(pcall('LMOVE', KEYS[6], KEYS[1], 'RIGHT', 'LEFT')) == 'string' do end
  return false
end
local limit = tonumber(ARGV[1])
local prefix, worker, lease = ARGV[2], ARGV[3], ARGV[4]
local first, now, seconds, ttl, most = tonumber(ARGV[5]), ARGV[6], ARGV[7], tonumber(ARGV[8]), tonumber(ARGV[9])
local job_prefix, run_prefix, runs_prefix = prefix .. ':job:', prefix .. ':execution:', prefix .. ':executions:'
local ends = math.floor(tonumber(seconds)) + ttl
local taken, bytes, seen = {}, 0, {}
local members, running = {}, {}
local alone = false
local ids = pcall('LRANGE', KEYS[6], 0, limit - 1)
local handed = #ids
local queued = handed < limit and pcall('LRANGE', KEYS[1], 0, limit - handed - 1) or {}
if ids['err'] or queued['err'] then
  return redis.error_reply('WRONGTYPE ' .. KEYS[ids['err'] and 6 or 1] .. ' is no list; delete it')
end
for n, id in ipairs(queued) do
  ids[handed + n] = id
end
for n, id in ipairs(ids) do
  if bytes >= most or alone then break end
  local job = job_prefix .. id
  local values = find(id, '^[%w_-]+$') and pcall('HMGET', job, 'data', 'attempts', 'deaths', $FIELDS) or {err = ''}
  -- Who cancels a job with RQ takes it out of the queue, and misses it where it was handed over.
  if values['err'] or values[$STATUS] == 'canceled' or (not values[1] and call('EXISTS', job) == 0) then
    taken[n] = {id, ''}
  elseif seen[id] then
    -- An id that stands in the queue twice is one job, and is run once.
    taken[n] = false
  else
    -- What a dead worker held runs alone, so that it is seen whose fault that was.
    alone = values[3] and true
    if alone and #running > 0 then break end
    seen[id] = true
    bytes = bytes + #(values[1] or '')
    local whole
    for at = 4, 3 + $HANGING do
      if values[at] and values[at] ~= '' then
        whole = call('HGETALL', job)
        break
      end
    end
    local execution = lease .. '-' .. (first + n)
    local count = #running + 1
    running[count] = id .. ':' .. execution
    members[2 * count - 1] = ends
    members[2 * count] = running[count]
    taken[n] = {id, execution, values, whole}
  end
end
-- The first write. Scripts don't roll back: up to here they may raise, and must not from here on, with some jobs started.
if #running > 0 then
  local added = pcall('ZADD', KEYS[2], unpack(members))
  if type(added) == 'table' then
    local other_type = find(added['err'], 'WRONGTYPE')
    return redis.error_reply(other_type and 'WRONGTYPE ' .. KEYS[2] .. ' is no sorted set; delete it' or added['err'])
  end
  pcall('SADD', KEYS[4], unpack(running))
  pcall('EXPIRE', KEYS[4], ttl + 60)
end
for _, entry in ipairs(taken) do
  if entry and entry[2] ~= '' then
    local id, execution, values = entry[1], entry[2], entry[3]
    local record, runs = run_prefix .. id .. ':' .. execution, runs_prefix .. id
    call('HSET', job_prefix .. id, 'status', 'started', 'started_at', now, 'last_heartbeat', now,
      'worker_name', worker, 'attempts', 1 + (tonumber(values[2]) or 0))
    call('PERSIST', job_prefix .. id)
    call('HSET', record, 'id', execution, 'job_id', id, 'created_at', seconds, 'last_heartbeat', seconds,
      'worker_name', worker, unpack(#running == 1 and ARGV[10] == '1' and {'alone', 1} or {}))
    call('EXPIRE', record, ttl)
    if type(pcall('ZADD', runs, ends + 60, execution)) == 'table' then
      call('DEL', runs)
      call('ZADD', runs, ends + 60, execution)
    end
    call('EXPIRE', runs, ttl + 60)
  end
end
if #taken > 0 and handed > 0 then
  call('LTRIM', KEYS[6], #taken, -1)
end
if #taken > handed then
  call('LTRIM', KEYS[1], #taken - handed, -1)
end
if ARGV[11] ~= '' and call('EXISTS', run_prefix .. ARGV[11]) == 1 then
  pcall('HSET', run_prefix .. ARGV[11], 'alone', 1)
end
pcall('HSET', KEYS[3], 'state', (#running > 0 or ARGV[12] == '1') and 'busy' or 'idle')
return taken
